//! How a job ended, whose fault it was, and why: closed lists, since each value is a metric label, an
//! exit code and a decision whether to try again. Error text never decides anything.

use serde::{Deserialize, Serialize};

/// Whose fault a failure is. It decides retry, exit code and alert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Blame {
    /// The job itself: its spec, its agent, its workspace. Trying again gives the same.
    Job,
    /// This machine or this daemon: engine, disk, image. Trying again may help.
    Host,
    /// The model provider: refused, overloaded, unreachable.
    Provider,
}

/// The part of a job's road on which something happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Workspace, image, lease, container.
    Prepare,
    /// The job's own commands before its agent.
    Setup,
    /// From the start of PID 1 until the CLI answered `initialize`.
    Boot,
    /// The conversation.
    Run,
    /// Reading back what the job left, and destroying the cell.
    Collect,
    /// The job's own commands after its agent.
    Verify,
}

impl Phase {
    /// All phases in order; metrics are seeded from it.
    pub const ALL: [Self; 6] =
        [Self::Prepare, Self::Setup, Self::Boot, Self::Run, Self::Collect, Self::Verify];

    /// The name used in metrics and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Setup => "setup",
            Self::Boot => "boot",
            Self::Run => "run",
            Self::Collect => "collect",
            Self::Verify => "verify",
        }
    }
}

/// Why a job was stopped by a decision. The first one wins and is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StopReason {
    /// The owner or the admin asked for it.
    Cancelled,
    /// The wall-clock limit.
    Deadline,
    /// No output for the silence limit.
    Silent,
    /// The cost limit.
    Budget,
    /// The turn limit.
    Turns,
    /// The daemon was told to stop and its drain time ran out.
    Drain,
}

impl StopReason {
    /// All reasons; metrics are seeded from it.
    pub const ALL: [Self; 6] =
        [Self::Cancelled, Self::Deadline, Self::Silent, Self::Budget, Self::Turns, Self::Drain];

    /// The name used in metrics and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cancelled => "cancelled",
            Self::Deadline => "deadline",
            Self::Silent => "silent",
            Self::Budget => "budget",
            Self::Turns => "turns",
            Self::Drain => "drain",
        }
    }
}

/// Why a job failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FailReason {
    /// The image is neither present nor can it be pulled, or has another architecture.
    ImageUnavailable,
    /// The image lacks what a cell needs (a shell, a C library that a bundle exists for).
    ImageUnsuitable,
    /// The workspace's own Dockerfile or devcontainer could not be built.
    ImageBuildFailed,
    /// None of the runtimes that the policy allows is on this machine and fit for cells.
    RuntimeUnavailable,
    /// No agent bundle of the wanted version, architecture and C library.
    AgentMissing,
    /// The workspace is not what was submitted any more.
    WorkspaceMoved,
    /// The workspace could not be mounted for the cell.
    WorkspaceSetup,
    /// The engine does not answer.
    EngineUnavailable,
    /// The engine refused to create the container.
    ContainerCreate,
    /// The engine could not start the container.
    ContainerStart,
    /// PID 1 of the cell did not report in time, or the link to it was lost for good.
    CellLost,
    /// A command of `setup` ended with an error.
    SetupFailed,
    /// The commands of `setup` took longer than they may.
    SetupDeadline,
    /// A command of `verify` ended with an error.
    VerifyFailed,
    /// The commands of `verify` took longer than they may.
    VerifyDeadline,
    /// The command of a job without an agent ended with an error.
    CommandFailed,
    /// The CLI could not be executed or ended before it answered `initialize`.
    AgentStart,
    /// The CLI ended with an error, or said that the turn failed.
    AgentError,
    /// The CLI broke its protocol (no JSON, a line over the limit, the gate not accepted).
    AgentProtocol,
    /// The kernel killed the cell's processes for memory.
    Oom,
    /// The cell's disk space is used up.
    DiskFull,
    /// The gateway refused what the agent asked of the model (a model, a field, a size).
    GatewayRefused,
    /// The provider refused the credential (401, 403).
    ProviderAuth,
    /// The provider limits or is overloaded (429, 529) and the CLI gave up.
    ProviderLimit,
    /// The provider failed (5xx, cut stream, unreachable) and the CLI gave up.
    ProviderError,
    /// The provider rejected the request (400, 404, 413).
    ProviderRejected,
    /// A fault of the daemon itself (store, journal, a task that died).
    Internal,
}

impl FailReason {
    /// All reasons; metrics are seeded from it.
    pub const ALL: [Self; 27] = [
        Self::ImageUnavailable,
        Self::ImageUnsuitable,
        Self::ImageBuildFailed,
        Self::RuntimeUnavailable,
        Self::AgentMissing,
        Self::WorkspaceMoved,
        Self::WorkspaceSetup,
        Self::EngineUnavailable,
        Self::ContainerCreate,
        Self::ContainerStart,
        Self::CellLost,
        Self::SetupFailed,
        Self::SetupDeadline,
        Self::VerifyFailed,
        Self::VerifyDeadline,
        Self::CommandFailed,
        Self::AgentStart,
        Self::AgentError,
        Self::AgentProtocol,
        Self::Oom,
        Self::DiskFull,
        Self::GatewayRefused,
        Self::ProviderAuth,
        Self::ProviderLimit,
        Self::ProviderError,
        Self::ProviderRejected,
        Self::Internal,
    ];

    /// The name used in metrics and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ImageUnavailable => "image_unavailable",
            Self::ImageUnsuitable => "image_unsuitable",
            Self::ImageBuildFailed => "image_build_failed",
            Self::RuntimeUnavailable => "runtime_unavailable",
            Self::AgentMissing => "agent_missing",
            Self::WorkspaceMoved => "workspace_moved",
            Self::WorkspaceSetup => "workspace_setup",
            Self::EngineUnavailable => "engine_unavailable",
            Self::ContainerCreate => "container_create",
            Self::ContainerStart => "container_start",
            Self::CellLost => "cell_lost",
            Self::SetupFailed => "setup_failed",
            Self::SetupDeadline => "setup_deadline",
            Self::VerifyFailed => "verify_failed",
            Self::VerifyDeadline => "verify_deadline",
            Self::CommandFailed => "command_failed",
            Self::AgentStart => "agent_start",
            Self::AgentError => "agent_error",
            Self::AgentProtocol => "agent_protocol",
            Self::Oom => "oom",
            Self::DiskFull => "disk_full",
            Self::GatewayRefused => "gateway_refused",
            Self::ProviderAuth => "provider_auth",
            Self::ProviderLimit => "provider_limit",
            Self::ProviderError => "provider_error",
            Self::ProviderRejected => "provider_rejected",
            Self::Internal => "internal",
        }
    }

    /// Whether the same job may well fare better in another try on this machine: the engine was away, or lost what it
    /// was given. What is missing here, or broken for good, is missing in the next try too.
    pub fn is_transient(self) -> bool {
        match self {
            Self::EngineUnavailable | Self::ContainerCreate | Self::ContainerStart | Self::CellLost => true,
            Self::ImageUnavailable
            | Self::ImageUnsuitable
            | Self::ImageBuildFailed
            | Self::RuntimeUnavailable
            | Self::AgentMissing
            | Self::WorkspaceMoved
            | Self::WorkspaceSetup
            | Self::SetupFailed
            | Self::SetupDeadline
            | Self::VerifyFailed
            | Self::VerifyDeadline
            | Self::CommandFailed
            | Self::AgentStart
            | Self::AgentError
            | Self::AgentProtocol
            | Self::Oom
            | Self::DiskFull
            | Self::GatewayRefused
            | Self::ProviderAuth
            | Self::ProviderLimit
            | Self::ProviderError
            | Self::ProviderRejected
            | Self::Internal => false,
        }
    }

    /// Whose fault it is.
    pub fn blame(self) -> Blame {
        match self {
            Self::ImageUnsuitable
            | Self::ImageBuildFailed
            | Self::WorkspaceMoved
            | Self::SetupFailed
            | Self::SetupDeadline
            | Self::VerifyFailed
            | Self::VerifyDeadline
            | Self::CommandFailed
            | Self::AgentStart
            | Self::AgentError
            | Self::AgentProtocol
            | Self::Oom
            | Self::DiskFull
            | Self::GatewayRefused
            | Self::ProviderRejected => Blame::Job,
            Self::ImageUnavailable
            | Self::RuntimeUnavailable
            | Self::AgentMissing
            | Self::WorkspaceSetup
            | Self::EngineUnavailable
            | Self::ContainerCreate
            | Self::ContainerStart
            | Self::CellLost
            | Self::Internal => Blame::Host,
            Self::ProviderAuth | Self::ProviderLimit | Self::ProviderError => Blame::Provider,
        }
    }
}

/// A failure with its place and its story.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Failure {
    /// Where on the road.
    pub phase: Phase,
    /// Why, from the closed list.
    pub reason: FailReason,
    /// Whose fault: always `reason.blame()`, written out for readers of the JSON.
    pub blame: Blame,
    /// What happened, for people; at most [`Failure::MESSAGE_BYTES_MAX`] bytes.
    pub message: String,
}

impl Failure {
    /// Longest message kept.
    pub const MESSAGE_BYTES_MAX: usize = 4096;

    /// A failure; a message over the limit keeps its end, where the cause of a program's death stands.
    pub fn new(phase: Phase, reason: FailReason, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > Self::MESSAGE_BYTES_MAX {
            let mut cut = message.len() - Self::MESSAGE_BYTES_MAX + 4;
            while !message.is_char_boundary(cut) {
                cut += 1;
            }
            message = format!("…{}", &message[cut..]);
        }
        Self { phase, reason, blame: reason.blame(), message }
    }
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub enum Outcome {
    /// The agent finished its task.
    Succeeded,
    /// Something went wrong.
    Failed(Failure),
    /// A limit or a person ended it.
    Stopped {
        /// Which one came first.
        reason: StopReason,
    },
    /// A daemon died at a moment after which nobody can say how the job ended.
    Lost,
}

impl Outcome {
    /// The label of `hotcell_jobs_total{outcome}`.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed(_) => "failed",
            Self::Stopped { .. } => "stopped",
            Self::Lost => "lost",
        }
    }

    /// All labels; metrics are seeded from it.
    pub const LABELS: [&'static str; 4] = ["succeeded", "failed", "stopped", "lost"];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_json_and_metrics_are_the_same() {
        for reason in FailReason::ALL {
            assert_eq!(serde_json::to_value(reason).ok(), Some(reason.as_str().into()));
        }
        for reason in StopReason::ALL {
            assert_eq!(serde_json::to_value(reason).ok(), Some(reason.as_str().into()));
        }
    }

    #[test]
    fn a_long_story_keeps_its_end() {
        let long = "ä".repeat(5000) + "the cause";
        let failure = Failure::new(Phase::Run, FailReason::AgentError, long);
        assert!(failure.message.len() <= Failure::MESSAGE_BYTES_MAX);
        assert!(failure.message.ends_with("the cause"));
    }
}
